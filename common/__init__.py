"""What all processes share: options, messages, transport, errors. It imports none of the other rooms."""
