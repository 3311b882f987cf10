"""The robustness card: what a purifier withstands, from an attacker who does not know it to one who does."""
