"""The endpoints, one module for each API; each offers `endpoints(context)`, the list of its `Endpoint`s."""
