"""The parameter server: wire format, rounds, the server's process and the worker's end."""
