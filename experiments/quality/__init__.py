"""What each use of the clean rows is worth at equal epochs and at equal time: tables, images with BatchNorm, the demo."""
