"""Small real parts that ship with the package: scenes with known factors and a miniature CLIP trained on them."""
