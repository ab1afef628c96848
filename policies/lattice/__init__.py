"""What allows more than what: matchers, rules, profiles and whole policies compared."""
