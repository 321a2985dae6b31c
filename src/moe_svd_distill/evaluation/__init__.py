"""What an adapter does to its student, measured beside controls; and how much of it to keep."""
