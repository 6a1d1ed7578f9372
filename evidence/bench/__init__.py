"""What a connection costs, and how it ends: `serve_tcp` and other servers."""
