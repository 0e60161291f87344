"""The EAGLE family: EAGLE-1, EAGLE-2 (another tree) and EAGLE-3, in all published spellings."""
