"""The processes of one run: how they meet, agree and watch one another."""
