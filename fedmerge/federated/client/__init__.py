"""What a hospital does when it is asked."""
