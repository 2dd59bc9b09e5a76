"""Patchscopes: a representation read in one prompt and put into another, over grids of layers."""
