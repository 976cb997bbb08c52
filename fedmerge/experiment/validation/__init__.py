"""What a scenario and its sites say that does not fit together: each function gives the problems of one kind."""
