"""What a run will hold, send and take, before there is one."""
