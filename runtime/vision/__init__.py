"""The way from a picture to visual tokens: decoding, preprocessing, tiles, and how many tokens are kept."""
