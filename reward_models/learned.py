VERIFIED = "verified"
