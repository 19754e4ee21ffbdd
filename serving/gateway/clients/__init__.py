"""The connections of clients: uvicorn's HTTP protocol, and ASGI for any other server."""
