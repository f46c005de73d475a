"""What a job needs of machines that are not at hand: computed, and built without them."""
