-- Gives KEYS[1] ARGV[2] more milliseconds from now if it has the token ARGV[1].
if redis.call('GET', KEYS[1]) == ARGV[1] then
  return redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
return 0
