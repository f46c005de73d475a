"""What a job needs of machines that are not at hand: built without data, and computed."""
