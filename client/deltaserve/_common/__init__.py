"""What the client and the server share. The only private modules that the server imports."""
