"""Its folder is on the path of all tests of the evaluations: helpers of several rooms lie here."""
