"""A head in a model that you have: attached, folded into its weights, or exported. The door is `attachment`."""
