"""The seed policy: a small hybrid model made from nothing, by imitation of the environments' own oracles."""
