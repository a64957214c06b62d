"""The programs that Dynamo calls after compilation, their inputs and their state."""
