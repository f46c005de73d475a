"""What a job needs of machines that are not available: computed, and built without them."""
