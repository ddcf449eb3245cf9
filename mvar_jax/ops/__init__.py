"""Pure functions of arrays and host integers: every formula of the method has its home here."""
