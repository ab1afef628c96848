"""Shell text: read whole, resolved and judged command by command."""
