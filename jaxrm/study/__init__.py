"""The lab: many arms, worlds and seeds compared."""
