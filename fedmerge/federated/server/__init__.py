"""What the server does with hospitals, whatever carries the messages."""
