"""INPUT as a stream of images, from a listing or a manifest; container files are expanded to their images."""
