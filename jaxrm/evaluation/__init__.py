"""What a model is worth, in plain numbers and on a page: NumPy in, floats and one HTML file out."""
