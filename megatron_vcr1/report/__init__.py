"""`vcr1 report`: what a run did and what its model can do, on one page that opens anywhere."""
