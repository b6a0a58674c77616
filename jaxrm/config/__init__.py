"""What a config is: fields, files, command lines."""
