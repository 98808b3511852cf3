"""The way from an image to visual tokens: decoding, preprocessing, tiles, and how many tokens are kept."""
