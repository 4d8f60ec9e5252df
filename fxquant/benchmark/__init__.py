"""How fast, how large and how accurate a model's int8 form is in each runtime, beside float."""
