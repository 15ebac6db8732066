"""Images: data sets of them, files of them, samples of them, and pixels made of them. The door is `data_sets`."""
