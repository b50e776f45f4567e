"""Where each sample's uncertainty comes from: estimators, backends that answer, the cache between."""
