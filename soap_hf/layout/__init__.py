"""Finding a backbone's patch tokens: what it declares, and what a probe shows. The door is `backbone`."""
