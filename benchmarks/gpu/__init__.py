"""``make gpu``: every test and benchmark that needs a GPU, in stages that are not repeated once they are done."""
