"""Networks from published weights, which are not trained."""
