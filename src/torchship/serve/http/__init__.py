"""A web server that knows no model: bytes to exchanges, over HTTP/1.1 and HTTP/2, and back."""
