"""What is left when compilation is over: the programs that Dynamo calls."""
