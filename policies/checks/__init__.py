"""What is doubtful about a policy that loads, and what its own tests say."""
