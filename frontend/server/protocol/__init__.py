"""What travels over HTTP, as Structs: bodies of requests (strict: an unknown field is refused) and of answers."""
