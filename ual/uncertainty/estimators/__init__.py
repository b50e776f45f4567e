"""One file per estimator; `registry` lists them."""
