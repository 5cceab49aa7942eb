"""What the papers measured, on worlds: tables and claims."""
