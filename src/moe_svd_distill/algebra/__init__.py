"""Pure functions of tensors: every formula of the project, once. No files, no configuration, no devices chosen."""
