"""Files that appear complete or not at all: text, images, arrays, directories."""
