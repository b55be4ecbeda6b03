"""INPUT as a stream of images: what is listed, what a manifest names, what container files hold."""
