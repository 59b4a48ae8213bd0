"""The protocols over HTTP and gRPC, with what tells of a server and looks after it."""
