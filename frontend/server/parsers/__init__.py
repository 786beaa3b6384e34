"""What finds tool calls and reasoning in an answer's text."""
