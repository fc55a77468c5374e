"""What more than one of the scripts needs, one subject per module."""
