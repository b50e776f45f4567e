"""A real model and a mixed data set from installed packages, to try the whole pipeline on two CPU cores."""
