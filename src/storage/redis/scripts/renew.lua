-- Gives the lock KEYS[1] ARGV[2] more milliseconds from now if it has the token ARGV[1].
-- Answers 0 if not, 1 if so, 2 if so and others stand in its queue, KEYS[2].
if redis.call('GET', KEYS[1]) == ARGV[1] then
  return redis.call('PEXPIRE', KEYS[1], ARGV[2]) + redis.call('EXISTS', KEYS[2])
end
return 0
